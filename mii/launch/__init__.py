"""The entry points of a deployment's processes: ``python -m mii.launch.<what> <folder of the deployment> <role>``."""
