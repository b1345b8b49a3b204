"""From a row of data to a batch of token ids."""
