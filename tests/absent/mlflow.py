"""On PYTHONPATH of what tests start: DeepSpeed imports MLflow wherever it is installed, for 1.7 s a process."""

raise ImportError("mlflow: left out by tests/conftest.py")
