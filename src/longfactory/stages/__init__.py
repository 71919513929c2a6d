"""The stages of post-training: what is learnt from which samples, and with which loss."""
