"""One prior over a tokenizer's codes, from its settings to the images it generates and their scores."""
