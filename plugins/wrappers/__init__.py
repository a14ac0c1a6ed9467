"""What stands around local training: clipping, noise, codecs."""
