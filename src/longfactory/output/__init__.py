"""What is made of a trained model: an exported folder, a conversation, a report of the
environment.
"""
