"""Training by several processes, the ranks of ``torch.distributed``, each with one device.

Every rank holds the same choice of components and the same masters. Only the gradients of the
trained components cross the network.
"""
