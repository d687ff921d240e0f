#error "never compiled here: it needs CUTLASS"
