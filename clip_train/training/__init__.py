"""A training run: from config to summary (`run.py`), the LightningModule (`module.py`), and the run folder."""
