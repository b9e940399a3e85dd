"""Training: data sets, the U-Net's trainer and the noise-aware classifier's. Not part of the container image.

Imported by `model.evaluation`, of which it uses `plots` alone, for its sample sheets and loss curve. Nothing
else imports it.
"""
