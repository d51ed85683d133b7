"""Fine-tuning over a pool of devices: data, the driver's loop, checkpoints and reports."""
