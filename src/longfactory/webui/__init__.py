"""`longfactory webui`: a page in the browser to compose a run, to start, follow and stop it, to
compare runs, to talk with a checkpoint and to export it.

The server's process reads keys and logs and imports neither torch nor transformers: whatever needs
them runs in a process of its own, and may crash there.
"""
