"""The parts of the decoder, one file each."""
