"""One tokenizer from its settings to its scores: config, model, losses, training, evaluation, costs, budgets."""
