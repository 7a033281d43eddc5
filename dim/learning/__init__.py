"""What one step of training is made of; pure torch."""
