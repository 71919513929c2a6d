"""Development tools that are not installed with the package: the sweep over model families and its
tiny models.
"""
