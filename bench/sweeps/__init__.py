"""Studies: what is missing of a plan, who works on what, each trial in a process of its own. Optuna lives here."""

import warnings

import optuna

optuna.logging.set_verbosity(optuna.logging.ERROR)
warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
