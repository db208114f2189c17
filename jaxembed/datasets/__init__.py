"""TensorFlow Datasets builders of the paper's data, from its original files to examples. TensorFlow is not needed."""
