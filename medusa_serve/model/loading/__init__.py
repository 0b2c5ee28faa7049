"""From a name to a model on its device with its tokenizer. Nothing here runs a pass for a request.

load           the steps in order            source        what a name means           hub   downloads
choose         device and numbers            room · slots  how many slots, how long a context
gpu_facts      the GPU and its free memory   gpu_memory    what a model will take of it
default_model  the model from a package      gguf          a GGUF file as a folder
tokenizer      between text and ids          process_lock  what one engine at a time may do
"""
