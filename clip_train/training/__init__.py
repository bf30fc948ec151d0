"""The LightningModule, the optimizer and schedule, the run folder and the callbacks of a training run."""
