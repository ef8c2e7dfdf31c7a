"""The model: head, kernels, encoder and the drop-in layer. Importing it needs only numpy."""
