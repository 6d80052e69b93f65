"""The verbs of the command line, one module each: ``add`` declares its options, ``run`` does it.

Nothing here imports torch before a verb runs: ``llmapi --help`` answers at once.
"""
