//! The C library as its users get it: installed by `make install`, linked by programs in C and C++, and run.
//!
//! The programs are under `tests/c`, `tests/cpp` and `lease-ffi/examples`. A test whose tool this machine lacks is counted
//! as ignored, and says what it needs; with `TEST_TOOLS=required` it fails. `make test-tools` gets them. The servers that
//! `make etcd` gets have to be there where `CI` is set.

// Shared with the tests of the core, which use all of it.
#[allow(dead_code)]
#[path = "../../lease-core/tests/support/etcd.rs"]
mod etcd;
#[allow(dead_code)]
#[path = "../../lease-core/tests/support/journal.rs"]
mod journal;
#[allow(dead_code)]
#[path = "../../lease-core/tests/support/scratch.rs"]
mod scratch;

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, LazyLock};
use std::{env, fs};

use libtest_mimic::{Arguments, Failed, Trial};

type Outcome<T = ()> = Result<T, Failed>;

const WARNINGS: [&str; 4] = ["-Wall", "-Wextra", "-Wpedantic", "-Werror"];
const CONTENDERS: usize = 50;
const GRANTS: usize = 40;

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let trials = Trials::all();
    let missing = trials.missing;
    let conclusion = libtest_mimic::run(&arguments, trials.list);
    if !arguments.list {
        for tool in missing {
            eprintln!("native: this machine lacks {tool}. make test-tools gets it, or says how to");
        }
    }
    conclusion.exit_code()
}

// ------------------------------------------------------------------------------- what is tested

#[derive(Default)]
struct Trials {
    list: Vec<Trial>,
    missing: BTreeSet<&'static str>,
}

impl Trials {
    fn all() -> Self {
        let mut all = Self::default();
        let tools = Arc::new(Tools::find());
        all.headers(&tools);
        all.programs(&tools);
        all.on_etcd(&tools);
        all.checked(&tools);
        all.consumers(&tools);
        all.readme(&tools);
        all
    }

    /// Adds a test. `needs` are the tools it cannot do without, and whether they are there.
    fn add(
        &mut self,
        name: impl Into<String>,
        needs: &[(&'static str, bool)],
        test: impl FnOnce() -> Outcome + Send + 'static,
    ) {
        let name = name.into();
        let lacks: Vec<_> = needs.iter().filter(|(_, found)| !found).map(|(tool, _)| *tool).collect();
        let Some(first) = lacks.first() else {
            self.list.push(Trial::test(name, test));
            return;
        };
        self.missing.extend(&lacks);
        let lack = format!("this machine lacks {first}");
        let is_required = env::var("TEST_TOOLS").is_ok_and(|value| value == "required");
        let trial = Trial::test(name, move || Err(Failed::from(lack)));
        self.list.push(trial.with_kind(format!("lacks {first}")).with_ignored_flag(!is_required));
    }

    fn headers(&mut self, tools: &Arc<Tools>) {
        for (who, compilers) in [("cc", Some(&tools.cc)), ("clang", tools.clang.as_ref())] {
            for (file, language, standards) in [
                ("lease.h", "c", &["c99", "c11", "c17"][..]),
                ("lease.h", "c++", &["c++17", "c++20"][..]),
                ("lease.hpp", "c++", &["c++17", "c++20"][..]),
            ] {
                for standard in standards {
                    let compiler = compilers.and_then(|compilers| compilers.of(language == "c++")).cloned();
                    let name = format!("header {file} {who} {standard}");
                    let needed = if who == "clang" { "clang" } else { CXX };
                    self.add(name, &[(needed, compiler.is_some())], move || {
                        let scratch = Scratch::new(&format!("header-{file}-{who}-{standard}"))?;
                        let source =
                            scratch.file("only.c", &format!("#include <{file}>\nint main(void) {{ return 0; }}\n"))?;
                        let mut compile = command(&compiler.expect("it was found"));
                        compile.args(WARNINGS).args(["-Wconversion", "-Wshadow", "-c", "-x", language]);
                        compile.arg(format!("-std={standard}")).arg("-I").arg(root().join("include")).arg(source);
                        compile.arg("-o").arg(scratch.0.join("only.o"));
                        run(&mut compile).map(drop)
                    });
                }
            }
        }
        self.add("only our names are exported", &[], only_our_names);
    }

    fn programs(&mut self, tools: &Arc<Tools>) {
        let uv = [("libuv (with pkg-config)", tools.uv.is_some())];
        let ev = [("libev", tools.ev)];
        let clang = [("clang", tools.clang.is_some())];
        let uv_flags = tools.uv.clone().unwrap_or_default();
        let program = |source| Program { source, standard: "c11", tools: tools.clone(), ..Program::default() };

        self.program("surface", &[], program("tests/c/surface.c"));
        self.program("surface, linked statically", &[], Program { is_static: true, ..program("tests/c/surface.c") });
        self.program("surface, by clang", &clang, Program { with_clang: true, ..program("tests/c/surface.c") });
        for standard in ["c++17", "c++20"] {
            let surface = Program { standard, ..program("tests/cpp/surface.cpp") };
            self.program(&format!("classes {standard}"), &[], surface.clone());
            self.program(&format!("classes {standard}, by clang"), &clang, Program { with_clang: true, ..surface });
            let loss = Program { standard, arguments: &["{dir}"], ..program("tests/cpp/loss.cpp") };
            self.program(&format!("loss {standard}"), &[], loss);
        }
        self.program("loss", &[], Program { arguments: &["{dir}"], ..program("tests/c/loss.c") });
        self.program("events: poll and epoll", &[], program("tests/c/events.c"));
        self.program(
            "events: libuv",
            &uv,
            Program { flags: uv_flags.clone(), standard: "gnu11", ..program("tests/c/events_uv.c") },
        );
        let flags = vec!["-lev".into()];
        self.program("events: libev", &ev, Program { flags, ..program("tests/c/events_ev.c") });
        self.program("ends of threads and of the process", &[], program("tests/c/ends.c"));
        self.program("callbacks", &[], program("tests/c/callbacks.c"));
        self.program("handles", &[], Program { arguments: &["3000"], ..program("tests/c/handles.c") });
        self.program("signals", &[], program("tests/c/signals.c"));
        self.program("forks", &[], Program { arguments: &["{dir}"], ..program("tests/c/forks.c") });
        for url in ["memory:", "sqlite:{dir}/jobs.db"] {
            let arguments: &[&str] =
                if url == "memory:" { &["memory:", "100000"] } else { &["sqlite:{dir}/jobs.db", "100000"] };
            self.program(&format!("100,000 cycles {url}"), &[], Program { arguments, ..program("tests/c/cycles.c") });
        }
        for mode in ["threads", "processes", "unlocked"] {
            let contention = Program { arguments: &["{mode}", "{dir}"], mode, ..program("tests/c/contention.c") };
            self.add(format!("contention: {CONTENDERS} {mode}"), &[], move || contend(&contention, mode));
        }

        for (source, standard) in [("worker.c", "gnu11"), ("epoll.c", "gnu11"), ("worker.cpp", "c++20")] {
            let path = format!("lease-ffi/examples/{source}").leak();
            let example = Program { standard, arguments: &["sqlite:{dir}/jobs.db"], last: "done", ..program(path) };
            self.program(&format!("example {source}"), &[], example.clone());
            if standard == "gnu11" {
                self.add(format!("example {source}, interrupted"), &[], move || interrupted(&example));
            }
        }
        let arguments: &[&str] = &["sqlite:{dir}/jobs.db"];
        let libuv = Program { standard: "gnu11", ..program("lease-ffi/examples/libuv.c") };
        self.program("example libuv.c", &uv, Program { flags: uv_flags, arguments, last: "done", ..libuv });
    }

    /// On real servers; shown as ignored where there are none, and a failure where there have to be.
    fn on_etcd(&mut self, tools: &Arc<Tools>) {
        for version in etcd::VERSIONS {
            let source = "tests/c/etcd.c";
            let program = Program { source, standard: "c11", tools: tools.clone(), ..Program::default() };
            let is_missing = !etcd::is_there(version);
            if is_missing {
                eprintln!("THERE IS NO ETCD {version}: the C library is not tested on it. `make etcd` gets it.");
            }
            let test = move || {
                if is_missing {
                    return Err("there is no such etcd: run `make etcd`".into());
                }
                frozen_and_thawed(&program, version)
            };
            let trial = Trial::test(format!("etcd {version}"), test);
            self.list.push(trial.with_ignored_flag(is_missing && env::var_os("CI").is_none()));
        }
    }

    /// What README.md shows is what works.
    fn readme(&mut self, tools: &Arc<Tools>) {
        for (language, compiler) in [("c", tools.cc.of(false)), ("cpp", tools.cc.of(true))] {
            let compiler = compiler.cloned();
            self.add(format!("README.md in {language}"), &[(CXX, compiler.is_some())], move || {
                let scratch = Scratch::new(&format!("readme-{language}"))?;
                let readme = fs::read_to_string(root().join("README.md"))?;
                let text = readme.split_once(&format!("```{language}\n")).and_then(|(_, rest)| rest.split_once("```"));
                let (text, _) = text.ok_or("README.md has no such program")?;
                let (source, program) =
                    (scratch.file(&format!("nightly.{language}"), text)?, scratch.0.join("nightly"));
                let (include, lib) = (stage()?.join("include"), stage()?.join("lib"));
                let mut compile = command(&compiler.expect("it was found"));
                compile.args(WARNINGS).arg(source).arg("-o").arg(&program).arg("-I").arg(include).arg("-L").arg(&lib);
                run(compile.args(["-llease", &format!("-Wl,-rpath,{}", lib.display())]))?;
                let printed = run(Command::new(program).current_dir(&scratch.0))?;
                if printed.lines().count() == 3 {
                    ends_with(&printed, "row 2 under fence 1")
                } else {
                    Err(printed.into())
                }
            });
        }
    }

    fn program(&mut self, name: &str, needs: &[(&'static str, bool)], program: Program) {
        let has_compiler = program.compilers().is_none_or(|compilers| compilers.of(program.is_cxx()).is_some());
        let needs = &[needs, &[(CXX, has_compiler)]].concat();
        let scratch = name.replace(|letter: char| !letter.is_ascii_alphanumeric(), "-");
        self.add(name, needs, move || program.run(&Scratch::new(&scratch)?).map(drop));
    }

    /// The same under tools that see what a test does not: memory that is lost, or used after it was freed.
    fn checked(&mut self, tools: &Arc<Tools>) {
        for (name, source, arguments) in [
            ("surface", "tests/c/surface.c", &[][..]),
            ("events", "tests/c/events.c", &[][..]),
            ("callbacks", "tests/c/callbacks.c", &[][..]),
            ("handles", "tests/c/handles.c", &["40"][..]),
            ("cycles memory", "tests/c/cycles.c", &["memory:", "300"][..]),
            ("cycles sqlite", "tests/c/cycles.c", &["sqlite:{dir}/jobs.db", "300"][..]),
            ("classes", "tests/cpp/surface.cpp", &[][..]),
        ] {
            let standard = if Path::new(source).extension() == Some(OsStr::new("cpp")) { "c++20" } else { "gnu11" };
            let program = Program { source, arguments, standard, tools: tools.clone(), ..Program::default() };
            let by_valgrind = Program { wrapper: VALGRIND, ..program.clone() };
            self.program(&format!("valgrind: {name}"), &[("valgrind", tools.valgrind)], by_valgrind);
            let flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer"];
            let sanitized = Program { flags: flags.map(str::to_owned).to_vec(), ..program };
            self.program(&format!("ASan, LSan: {name}"), &[("ASan and LSan", tools.asan)], sanitized);
        }
    }

    fn consumers(&mut self, tools: &Arc<Tools>) {
        let pkg_config = [("pkg-config", tools.pkg_config.is_some())];
        for is_static in [false, true] {
            let (tools, how) = (tools.clone(), if is_static { "static" } else { "shared" });
            self.add(format!("consumer by pkg-config, {how}"), &pkg_config, move || by_pkg_config(&tools, is_static));
        }
        let cmake = tools.cmake.clone();
        self.add("consumer by find_package", &[("CMake", cmake.is_some())], move || {
            by_cmake(&cmake.expect("it was found"))
        });
        self.add("make install within DESTDIR", &[], within_destdir);
    }
}

const VALGRIND: &[&str] = &[
    "valgrind",
    "--quiet",
    "--error-exitcode=9",
    "--leak-check=full",
    "--show-leak-kinds=definite,indirect",
    "--errors-for-leak-kinds=definite,indirect",
    "--fair-sched=yes",
];

fn only_our_names() -> Outcome {
    let functions = include_str!("abi.txt").lines().filter_map(|line| line.split_once('('));
    let words = functions.filter_map(|(before, _)| before.split([' ', '*']).next_back());
    let expected: BTreeSet<_> = words.filter(|word| word.starts_with("lease_")).map(str::to_owned).collect();
    for (file, option) in [("liblease.so", "-D"), ("liblease.a", "-g")] {
        let mut nm = Command::new("nm");
        nm.args([option, "--defined-only"]).arg(stage()?.join("lib").join(file));
        let output = run(&mut nm)?;
        let names = output.lines().filter_map(|line| line.split(' ').nth(2)).map(str::to_owned);
        let names: BTreeSet<_> = names.collect();
        if names != expected {
            return Err(format!("{file}: {:?}", names.symmetric_difference(&expected)).into());
        }
    }
    let mut readelf = Command::new("readelf");
    readelf.env("LC_ALL", "C").arg("-d").arg(stage()?.join("lib/liblease.so"));
    let dynamic = run(&mut readelf)?;
    for wanted in ["[liblease.so.0.1]", "NODELETE"] {
        if !dynamic.contains(wanted) {
            return Err(format!("liblease.so has no {wanted}:\n{dynamic}").into());
        }
    }
    Ok(())
}

fn contend(program: &Program, mode: &str) -> Outcome {
    let scratch = Scratch::new(&format!("contention-{mode}"))?;
    program.run(&scratch)?;
    let holdings = journal::read(&scratch.0)?;
    let verdict = journal::judge(&holdings);
    let is_clean = verdict.overlaps.is_empty() && verdict.disorder.is_empty();
    let (grants, contenders) = (holdings.len(), verdict.shares.len());
    if grants != CONTENDERS * GRANTS || contenders != CONTENDERS {
        return Err(format!("{grants} grants to {contenders} contenders").into());
    }
    // Where no lease is taken, the journals have to show it: else they would show nothing elsewhere either.
    if is_clean == (mode == "unlocked") {
        return Err(format!("{verdict:#?}").into());
    }
    Ok(())
}

/// Runs it on a server that is frozen and thawed when it says so.
fn frozen_and_thawed(program: &Program, version: &str) -> Outcome {
    let scratch = Scratch::new(&format!("etcd-{version}"))?;
    let built = program.build(&scratch)?;
    let cluster = etcd::Cluster::start(version, 1, &[]);
    let mut run_it = Command::new("timeout");
    run_it.env_remove("LD_LIBRARY_PATH").arg("--kill-after=5").arg("120").arg(built).arg(cluster.url("c"));
    let mut running = run_it.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let (mut stdin, stdout) = (running.stdin.take().expect("it is piped"), running.stdout.take());
    let (mut asked, mut printed) = (Vec::new(), String::new());
    for line in BufReader::new(stdout.expect("it is piped")).lines() {
        let line = line?;
        match &*line {
            "freeze" => cluster.freeze(0),
            "thaw" => cluster.thaw(0),
            _ => {
                printed = printed + &line + "\n";
                continue;
            }
        }
        writeln!(stdin, "done")?;
        asked.push(line);
    }
    let status = running.wait()?;
    if !status.success() || asked != ["freeze", "thaw"] {
        return Err(format!("{status}, after it asked for {asked:?}\n{printed}").into());
    }
    // It has closed its managers. A lease whose grant the frozen server never answered is nobody's, and expires; no key is.
    if cluster.keys("c/") != 0 {
        return Err(format!("{} keys are left", cluster.keys("c/")).into());
    }
    print!("{printed}");
    ends_with(&printed, "ok")
}

/// Ctrl-C in the middle of the work: the worker says so, and the name is free.
fn interrupted(example: &Program) -> Outcome {
    let scratch = Scratch::new(&format!("interrupted-{}", example.source.replace('/', "-")))?;
    let program = example.build(&scratch)?;
    let mut worker = Command::new(&program);
    worker.env_remove("LD_LIBRARY_PATH").arg(scratch.url()).stdin(Stdio::null()).stdout(Stdio::piped());
    let mut worker = worker.spawn()?;
    let mut lines = BufReader::new(worker.stdout.take().expect("it is piped")).lines();
    let first = lines.next().ok_or("it printed nothing")??;
    run(Command::new("kill").args(["-INT", &worker.id().to_string()]))?;
    let last = lines.map_while(Result::ok).last();
    let status = worker.wait()?;
    if !first.starts_with("row 0") || last.as_deref() != Some("interrupted") || status.code() != Some(130) {
        return Err(format!("{first}, then {last:?}, then {status}").into());
    }
    // The next need not wait for a ttl.
    ends_with(&run(Command::new("timeout").arg("10").arg(program).arg(scratch.url()))?, "done")
}

fn by_pkg_config(tools: &Tools, is_static: bool) -> Outcome {
    let (stage, scratch) = (stage()?, Scratch::new(&format!("pkg-config-{is_static}"))?);
    let mut flags = Command::new(tools.pkg_config.as_ref().expect("it was found"));
    flags.env("PKG_CONFIG_PATH", stage.join("lib/pkgconfig")).args(["--cflags", "--libs", "lease >= 0.1"]);
    flags.args(is_static.then_some("--static"));
    let flags = run(&mut flags)?;
    let program = scratch.0.join("consumer");
    let mut compile = command(&tools.cc.c);
    compile.arg(root().join("lease-ffi/examples/worker.c")).arg("-o").arg(&program);
    // As users do who want the archive and not the shared library of the same name.
    let flags =
        flags.split_whitespace().map(|flag| if is_static && flag == "-llease" { "-l:liblease.a" } else { flag });
    run(compile.args(flags).arg(format!("-Wl,-rpath,{}", stage.join("lib").display())))?;
    ends_with(&run(Command::new(program).arg(scratch.url()))?, "done")
}

fn by_cmake(cmake: &Path) -> Outcome {
    let scratch = Scratch::new("find-package")?;
    let worker = root().join("lease-ffi/examples/worker.c");
    let project = format!(
        "cmake_minimum_required(VERSION 3.13)\nproject(consumer C)\nfind_package(lease REQUIRED)\n\
         find_package(lease 0.1 REQUIRED)\nforeach(kind lease lease_static)\n  add_executable(by_${{kind}} {})\n  \
         target_link_libraries(by_${{kind}} PRIVATE lease::${{kind}})\nendforeach()\n\
         find_package(lease 0.2 QUIET)\nif(lease_FOUND)\n  message(FATAL_ERROR \"0.2 is not there\")\nendif()\n",
        worker.display()
    );
    scratch.file("CMakeLists.txt", &project)?;
    let build = scratch.0.join("build");
    let mut configure = Command::new(cmake);
    configure.arg("-S").arg(&scratch.0).arg("-B").arg(&build).args(["-G", "Unix Makefiles"]);
    configure.arg(format!("-DCMAKE_PREFIX_PATH={}", stage()?.display()));
    let mut make = Command::new(cmake);
    make.arg("--build").arg(&build);
    run(&mut configure)?;
    run(&mut make)?;
    for kind in ["by_lease", "by_lease_static"] {
        let mut consumer = Command::new(build.join(kind));
        consumer.arg(scratch.url());
        ends_with(&run(&mut consumer)?, "done")?;
    }
    Ok(())
}

/// For who makes a package: everything lies below DESTDIR, and knows only PREFIX.
fn within_destdir() -> Outcome {
    let scratch = Scratch::new("destdir")?;
    stage()?;
    let mut install = make("install");
    install.arg("PREFIX=/opt/lease").arg(format!("DESTDIR={}", scratch.0.display()));
    run(&mut install)?;
    let lib = scratch.0.join("opt/lease/lib");
    for file in ["liblease.a", "liblease.so", "cmake/lease/leaseConfig.cmake", "../include/lease.hpp"] {
        if !lib.join(file).exists() {
            return Err(format!("{file} was not installed").into());
        }
    }
    let pc = fs::read_to_string(lib.join("pkgconfig/lease.pc"))?;
    if !pc.contains("prefix=/opt/lease\nlibdir=${prefix}/lib\n") || pc.contains(&*scratch.0.to_string_lossy()) {
        return Err(format!("lease.pc:\n{pc}").into());
    }
    Ok(())
}

// ------------------------------------------------------------------------------- programs

/// A program of ours, and how it is built and run.
#[derive(Clone, Default)]
struct Program {
    source: &'static str,
    standard: &'static str,
    tools: Arc<Tools>,
    with_clang: bool,
    is_static: bool,
    flags: Vec<String>,
    wrapper: &'static [&'static str],
    /// With `{dir}` for a directory of its own, and `{mode}`.
    arguments: &'static [&'static str],
    mode: &'static str,
    /// Its last line, which shows that it came to its end; "ok" if empty.
    last: &'static str,
}

impl Program {
    fn is_cxx(&self) -> bool {
        Path::new(self.source).extension() == Some(OsStr::new("cpp"))
    }

    fn compilers(&self) -> Option<&Compilers> {
        if self.with_clang { self.tools.clang.as_ref() } else { Some(&self.tools.cc) }
    }

    /// Builds it against the installed library.
    fn build(&self, scratch: &Scratch) -> Outcome<PathBuf> {
        let (source, lib) = (root().join(self.source), stage()?.join("lib"));
        let compiler = self.compilers().and_then(|compilers| compilers.of(self.is_cxx()));
        let program = scratch.0.join("program");
        let mut compile = command(compiler.expect("it was found"));
        compile.arg(format!("-std={}", self.standard)).args(WARNINGS).args(["-g", "-O1", "-pthread"]);
        compile.arg("-I").arg(stage()?.join("include")).arg("-I").arg(root().join("tests/c"));
        compile.arg(&source).arg("-o").arg(&program).arg("-L").arg(&lib);
        if self.is_static {
            compile.args(["-l:liblease.a", "-lm"]);
        } else {
            compile.arg("-llease").arg(format!("-Wl,-rpath,{}", lib.display()));
        }
        run(compile.args(&self.flags))?;
        Ok(program)
    }

    /// Builds it, runs it in two minutes, and gives what it printed.
    fn run(&self, scratch: &Scratch) -> Outcome<String> {
        let program = self.build(scratch)?;
        let mut run_it = Command::new("timeout");
        run_it.arg("--kill-after=5").arg("120").args(self.wrapper).arg(program);
        let dir = scratch.0.to_str().ok_or("the target directory is not UTF-8")?;
        run_it.args(self.arguments.iter().map(|text| text.replace("{dir}", dir).replace("{mode}", self.mode)));
        let printed = run(&mut run_it)?;
        ends_with(&printed, if self.last.is_empty() { "ok" } else { self.last })?;
        Ok(printed)
    }
}

fn ends_with(printed: &str, last: &str) -> Outcome {
    if printed.lines().next_back() == Some(last) {
        return Ok(());
    }
    Err(format!("it did not come to its end:\n{printed}").into())
}

/// A directory of its own for each test, made anew.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Outcome<Self> {
        let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("native").join(name);
        if path.exists() {
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path)?;
        Ok(Self(path))
    }

    fn file(&self, name: &str, text: &str) -> Outcome<PathBuf> {
        let path = self.0.join(name);
        fs::write(&path, text)?;
        Ok(path)
    }

    fn url(&self) -> String {
        format!("sqlite:{}", self.0.join("jobs.db").display())
    }
}

/// Where the library is installed for these tests, once for all of them.
fn stage() -> Outcome<&'static Path> {
    static STAGE: LazyLock<Result<PathBuf, String>> = LazyLock::new(|| {
        let stage = Path::new(env!("CARGO_TARGET_TMPDIR")).join("stage");
        let mut install = make("install");
        install.arg(format!("PREFIX={}", stage.display())).arg("DESTDIR=");
        let installed = run(&mut install).map_err(|error| error.message().unwrap_or_default().to_owned());
        installed.map(|_| stage)
    });
    STAGE.as_deref().map_err(|error| Failed::from(format!("make install failed: {error}")))
}

fn make(target: &str) -> Command {
    let mut make = Command::new("make");
    // Not as a part of the make that may have called us.
    for variable in ["MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PREFIX", "LIBDIR", "INCLUDEDIR", "DESTDIR"] {
        make.env_remove(variable);
    }
    make.arg("-C").arg(root()).arg(target);
    make
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("it lies in the workspace").to_owned()
}

// ------------------------------------------------------------------------------- tools

/// A C and a C++ compiler, by the words that call them. A bare machine may have C alone.
#[derive(Clone, Default)]
struct Compilers {
    c: Vec<String>,
    cxx: Option<Vec<String>>,
}

impl Compilers {
    fn of(&self, is_cxx: bool) -> Option<&Vec<String>> {
        if is_cxx { self.cxx.as_ref() } else { Some(&self.c) }
    }
}

const CXX: &str = "a C++ compiler";

#[derive(Default)]
struct Tools {
    cc: Compilers,
    clang: Option<Compilers>,
    pkg_config: Option<PathBuf>,
    cmake: Option<PathBuf>,
    valgrind: bool,
    asan: bool,
    /// What compiles and links a program of libuv.
    uv: Option<Vec<String>>,
    ev: bool,
}

impl Tools {
    fn find() -> Self {
        let words = |variable: &str, usual: &str| {
            env::var(variable).unwrap_or_else(|_| usual.into()).split(' ').map(str::to_owned).collect::<Vec<_>>()
        };
        let cxx = Some(words("CXX", "c++")).filter(|cxx| run(command(cxx).arg("--version")).is_ok());
        let cc = Compilers { c: words("CC", "cc"), cxx };
        let asan = works(&cc.c, &["-fsanitize=address"], "int main(void) { return 0; }\n");
        let ev = works(&cc.c, &["-lev"], "#include <ev.h>\nint main(void) { return ev_version_major() < 0; }\n");
        let pkg_config = find("pkg-config").or_else(|| find("pkgconf"));
        let uv = pkg_config.as_ref().and_then(|pkg_config| {
            let flags = run(Command::new(pkg_config).args(["--cflags", "--libs", "libuv"])).ok()?;
            Some(flags.split_whitespace().map(str::to_owned).collect())
        });
        let (clang, cmake, valgrind) = (Self::clang(), find("cmake"), find("valgrind").is_some());
        Self { cc, clang, pkg_config, cmake, valgrind, asan, uv, ev }
    }

    /// Clang itself, or the one that Zig brings along.
    fn clang() -> Option<Compilers> {
        if find("clang").is_some() && find("clang++").is_some() {
            return Some(Compilers { c: vec!["clang".into()], cxx: Some(vec!["clang++".into()]) });
        }
        let python = [find("python"), find("python3")]
            .into_iter()
            .flatten()
            .find(|python| run(Command::new(python).args(["-m", "ziglang", "version"])).is_ok())?;
        let python = python.to_str()?;
        let zig = |command: &str| [python, "-m", "ziglang", command].map(str::to_owned).to_vec();
        Some(Compilers { c: zig("cc"), cxx: Some(zig("c++")) })
    }
}

/// A program of the directory of `make test-tools`, or of the PATH.
fn find(program: &str) -> Option<PathBuf> {
    let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent()?;
    let own = target.join("test-tools/bin");
    let path = env::var_os("PATH").unwrap_or_default();
    std::iter::once(own).chain(env::split_paths(&path)).map(|dir| dir.join(program)).find(|path| path.is_file())
}

/// Whether a program of this text can be built so and ends well.
fn works(compiler: &[String], flags: &[&str], text: &str) -> bool {
    let try_it = || -> Outcome {
        let scratch = Scratch::new(&format!("works{}", flags.concat()))?;
        let (source, program) = (scratch.file("works.c", text)?, scratch.0.join("works"));
        let mut compile = command(compiler);
        run(compile.arg("-w").arg(source).args(flags).arg("-o").arg(&program))?;
        run(&mut Command::new(program)).map(drop)
    };
    try_it().is_ok()
}

fn command(words: &[String]) -> Command {
    let mut command = Command::new(&words[0]);
    command.args(&words[1..]);
    command
}

/// Runs it to its end, and gives what it printed.
fn run(command: &mut Command) -> Outcome<String> {
    // Cargo's own would come before the path that is in the program.
    let said = command.env_remove("LD_LIBRARY_PATH").stdin(Stdio::null()).output();
    let said = said.map_err(|error| format!("{command:?}: {error}"))?;
    let (out, err) = (String::from_utf8_lossy(&said.stdout), String::from_utf8_lossy(&said.stderr));
    if said.status.success() {
        return Ok(out.into_owned());
    }
    Err(format!("{command:?}: {}\n{out}\n{err}", said.status).into())
}
