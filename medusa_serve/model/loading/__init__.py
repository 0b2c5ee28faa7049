"""From a name to a model on its device with its tokenizer. Nothing here runs a pass for a request.

load           the steps in order            source        what a name stands for          hub        downloads
choose         device and numbers            slots         slots and context               gpu_memory what a model will take
gpu_facts      the GPU and its free memory   default_model the model from a package        gguf       a GGUF file as a folder
tokenizer      between text and ids          process_lock  what only one engine may do at a time
"""
