"""The machinery beside the papers' concepts: flags, errors, run folders, checkpoints, processes, backbones."""
