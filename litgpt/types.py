"""Names of choices that more than one command offers."""

from typing import Literal

LoggerChoice = Literal["csv", "tensorboard", "wandb", "mlflow", "litlogger"]
