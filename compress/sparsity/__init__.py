"""Single weights become zero, shapes stay: the unstructured and the 2:4 form that ECoFLaP's paper measures."""
