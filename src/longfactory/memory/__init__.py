"""The memory engine: what a step needs, what is chosen, and the layers, buffers and optimizer that
carry it out. Usable without the rest of\nthe package but `sp`.
"""
