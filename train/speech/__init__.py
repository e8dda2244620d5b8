"""Speech: recordings, their features, masks of features in training, and errors of words."""
