"""Studies: what is missing of a plan, who works on what, each trial in a process of its own. Optuna lives here."""
