"""What people run: command lines, pictures, the predictor."""
