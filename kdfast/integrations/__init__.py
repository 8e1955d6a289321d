"""kdfast inside the trainers people use. Each module imports what it is for, so none is imported here:

kdfast.integrations.causal_lm       one loss for two causal language models of `transformers`, in any loop
kdfast.integrations.transformers    KDTrainer, KDTrainingArguments
kdfast.integrations.trl             TRL's generalized JSD loss
kdfast.integrations.lightning       KDModule, a LightningModule with a student, a teacher and a method
kdfast.integrations.on_policy       sequences the student samples itself
"""
