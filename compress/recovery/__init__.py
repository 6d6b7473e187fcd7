"""Recovery: give back what the cut cost (LPD of UKMP, and plainer recipes), merged into the dense weights."""
