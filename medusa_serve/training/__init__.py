"""Heads are trained here on the model's own answers. Only the command line, the notebook and the benches come here.

pipeline         one call: prompts, answers, training, report
prompts          prompts from a file or a data set, and which of them never train
distill          the model's answers to prompts
shards           answers on disk
forecast         before a training: how many answers this machine makes, and what heads learn from as many
train_config     what a training is asked for, and the line that reports how far it is
train_heads      the training itself: steps, memory, saving and going on
teacher          the frozen base, and fresh heads for it
hidden_store     the base's hidden states, computed once
batches          which positions heads learn from
loss             the loss and its gradient
optimizer_step   one step of the optimizer, and the learning rate's schedule
muon             the optimizer of the matrices
finish           after the last step: measure, calibrate, report, save
calibrate        ranks of the true tokens, calibration, forecast with static trees
report           the serving engine answers held-out prompts with the new heads

Letters in shapes: B rows of a batch, S tokens of the longest row, R answer positions that heads learn from, D depths,
H hidden size, V' draft vocabulary.
"""
