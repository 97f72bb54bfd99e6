"""Artefacts on disk: anchors, contributions, merged models, and the checkpoints of a running job."""
