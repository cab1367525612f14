"""What a plan would do, without training: costs and range tests."""
