"""What crosses a wire between the parts of the Platform Validator. No I/O."""
