//! What Python shows as documentation is that of the stubs, which is written once: a file a docstring, for `include_str!`.

use std::path::Path;
use std::{env, fs};

const STUBS: &str = "python/lease/_lease.pyi";

fn main() {
    println!("cargo::rerun-if-changed={STUBS}");
    println!("cargo::rerun-if-changed=build.rs");
    let stubs = fs::read_to_string(STUBS).expect("the stubs are there");
    let out = env::var("OUT_DIR").expect("cargo says where");
    let (mut class, mut path) = (String::new(), String::new());
    let mut lines = stubs.lines();
    while let Some(line) = lines.next() {
        let word = |line: &str| line.split(['(', ':']).next().unwrap_or_default().to_owned();
        if let Some(named) = line.strip_prefix("class ") {
            class = word(named);
            path.clone_from(&class);
        } else if let Some(named) = line.strip_prefix("    def ") {
            path = format!("{class}.{}", word(named));
        } else if let Some(first) = line.trim_start().strip_prefix("\"\"\"")
            && !path.is_empty()
        {
            let indent = line.len() - line.trim_start().len();
            let mut doc = String::new();
            let mut next = Some(first);
            while let Some(line) = next {
                let (text, ends) = line.strip_suffix("\"\"\"").map_or((line, false), |text| (text, true));
                doc.push_str(text.trim_end());
                doc.push('\n');
                next = if ends { None } else { lines.next().map(|line| line.get(indent..).unwrap_or_default()) };
            }
            fs::write(Path::new(&out).join(&path), doc.trim_end()).expect("it can be written");
            path.clear();
        }
    }
}
