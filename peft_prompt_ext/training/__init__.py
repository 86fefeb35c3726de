"""What the recipes are made of: a run's folder, its model, its Trainer, its card, and answers from it later on."""
