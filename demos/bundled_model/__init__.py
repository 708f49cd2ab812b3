"""How the bundled text-to-video model was made: data, training, evaluation."""
