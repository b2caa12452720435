"""What a build will do, and what it will cost, before anything heavy runs."""
