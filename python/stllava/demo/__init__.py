"""The demo: a data set of real pictures with known answers, a small base model, and the whole method on both."""
