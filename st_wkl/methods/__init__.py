"""Published methods that are more than a loss: collective labels, two rounds, moving average, coherence."""
