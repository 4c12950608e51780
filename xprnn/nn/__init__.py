"""What users build and own: layers, cells, linear layers, steppers, and their parameters."""
