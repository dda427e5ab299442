"""The `mor` command, importable without PyTorch.

It stands beside the package because `import mor` loads PyTorch and Transformers, to register
operators and model type: seconds in which `mor --help`, or a misspelt option, would wait.
"""
