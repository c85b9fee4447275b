"""What the export knows of KerasHub's tasks."""
