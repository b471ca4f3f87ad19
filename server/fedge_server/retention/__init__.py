"""What a server keeps is bounded: old releases and runs keep their rows, and lose their big bytes."""
