"""Other libraries' training steps at p828's sizes, for `p828 bench train --peers`."""
