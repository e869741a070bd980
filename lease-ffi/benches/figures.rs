//! To be replaced below.
fn main() {}
