//! Providers that are plugins: libraries that are none, and OpenVINO on an Intel processor, emulated where this is another.
//! Without the plugin, the emulator or a C compiler the tests say so and pass.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::Value;

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// What was said; an emulator warns of every instruction that it does not have.
fn text(output: &Output) -> String {
    let said = [&output.stdout, &output.stderr].map(|bytes| String::from_utf8_lossy(bytes).into_owned()).concat();
    said.lines().filter(|line| !line.contains("warning: TCG")).map(|line| format!("{line}\n")).collect()
}

#[track_caller]
fn ends(command: &mut Command, args: &[&str], code: i32, said: &str) -> String {
    let output = command.args(args).current_dir(root()).env_remove("BLIP2_MODEL").output().unwrap();
    let found = text(&output);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {found}");
    assert!(found.contains(said) && !found.contains("panicked"), "`{said}` is not in: {found}");
    found
}

/// A library of this source, in two forms that a flag chooses between.
fn compile(later: bool) -> Option<PathBuf> {
    let library = root().join(format!("target/tmp/broken-{later}{}", std::env::consts::DLL_SUFFIX));
    std::fs::create_dir_all(library.parent()?).ok()?;
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", if later { "-DLATER=1" } else { "-DLATER=0" }, "-o"]).arg(&library);
    let built = compiler.arg(root().join("tests/plugins/broken.c")).output().ok()?;
    built.status.success().then_some(library)
}

#[test]
fn libraries_that_are_no_plugins_are_named() {
    let caption = |library: &Path, said: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_blip2"));
        let library = library.to_str().unwrap();
        let args = ["caption", "--provider", "plugin:mine", "--ep-library", library, "models/samples/0.png"];
        let found = ends(&mut command, &args, 5, said);
        assert!(found.contains("blip2: provider `plugin:mine`"), "{found}");
    };
    caption(Path::new("/nowhere/plugin.so"), "there is no plugin at /nowhere/plugin.so");
    caption(&root().join("models"), "--ep-library takes the library");
    caption(&root().join("README.md"), "cannot use");
    let mut unnamed = Command::new(env!("CARGO_BIN_EXE_blip2"));
    unnamed.env_remove("BLIP2_EP_LIBRARY");
    let args = ["caption", "--provider", "plugin:mine", "models/samples/0.png"];
    ends(&mut unnamed, &args, 5, "is none that is known (openvino, webgpu, tensorrt-rtx), so its library must be named");
    let (Some(earlier), Some(later)) = (compile(false), compile(true)) else {
        return eprintln!("skipped: no C compiler for a plugin without a provider and one of another version");
    };
    caption(&earlier, "finds no device here; its library brings no provider");
    caption(&later, "as a plugin: this plugin needs ONNX Runtime 1.1000");
}

/// The binary on an Intel processor: OpenVINO offers no device on any other.
fn on_intel() -> Option<Command> {
    let is_intel = std::fs::read_to_string("/proc/cpuinfo").is_ok_and(|text| text.contains("GenuineIntel"));
    if is_intel {
        return Some(Command::new(env!("CARGO_BIN_EXE_blip2")));
    }
    let emulator = root().join("target/qemu/qemu-x86_64-static");
    emulator.is_file().then(|| {
        let mut command = Command::new(emulator);
        command.args(["-cpu", "Haswell", env!("CARGO_BIN_EXE_blip2")]);
        command
    })
}

#[test]
fn openvino_gives_what_the_processor_gives() {
    if on_intel().is_none() {
        return eprintln!("skipped: neither an Intel processor nor an emulated one; `make setup-openvino` installs it");
    }
    let doctor = on_intel().unwrap().args(["doctor", "--provider", "openvino"]).output().unwrap();
    let said = text(&doctor);
    if said.contains("openvino     not usable: provider `openvino` needs a plugin") {
        return eprintln!("skipped: the OpenVINO plugin is not there; `make setup-openvino` installs it");
    }
    assert!(
        said.contains("openvino     usable") && said.contains("--device 0: CPU of Intel (OpenVINOExecutionProvider)"),
        "{said}"
    );
    assert!(!said.contains("--device 1: CPU"), "the plugin's own ways of choosing a device are none: {said}");

    let run =
        |args: &[&str], code, said: &str| ends(&mut on_intel().unwrap(), &[args, &["--provider", "openvino"]].concat(), code, said);
    let lacks = "decoder does not fit provider openvino: it does not run GroupQueryAttention (2)";
    run(&["verify", "tests/bundles/t5"], 5, lacks);
    let on_processor = "blip2: decoder runs on the processor, for openvino does not run GroupQueryAttention (2)";
    run(&["verify", "tests/bundles/vqa-opt", "--allow-fallback=graphs"], 0, on_processor);
    // Cross-attention reads keys and values that are written after they were bound.
    let in_parts = "blip2: decoder leaves to the processor what openvino does not run: GroupQueryAttention (2)";
    run(&["verify", "tests/bundles/t5", "--allow-fallback", "--threads", "1"], 0, in_parts);

    let sample = "models/samples/0.png";
    run(&["caption", sample, "--device", "1"], 5, "finds no device 1 here; it counts from 0 and finds 1");
    let property = r#"load_config={"CPU":{"NONSENSE":"1"}}"#;
    run(&["caption", sample, "--ep-option", property], 5, "Unsupported property NONSENSE");
    faithful_or_refused(&run);
    let library =
        said.lines().find_map(|line| Some(&line[line.find(", /")? + 2..]).filter(|path| path.contains("openvino"))).unwrap();
    let mine = ["caption", sample, "--provider", "plugin:mine", "--ep-library", library, "--ep-option", property];
    ends(&mut on_intel().unwrap(), &mine, 5, "provider `plugin:mine` is not usable here; `blip2 doctor` lists what is: NotFound");
}

/// In bfloat16 vectors stay what they are, where the processor has it; elsewhere it is not taken for what it is not.
fn faithful_or_refused(run: &dyn Fn(&[&str], i32, &str) -> String) {
    let embed = ["embed", "image", "models/samples/0.png", "--model", "tests/bundles/stage1", "--allow-fallback"];
    let narrow = [&embed[..], &["--precision", "bfloat16"]].concat();
    #[cfg(target_arch = "x86_64")]
    let has_bfloat16 = std::arch::is_x86_feature_detected!("avx512bf16");
    #[cfg(not(target_arch = "x86_64"))]
    let has_bfloat16 = false;
    if !has_bfloat16 {
        run(&narrow, 5, "this processor has no instructions for bfloat16");
        return;
    }
    let vector = |args: &[&str]| -> Vec<f64> {
        let said = run(args, 0, "[");
        let line = said.lines().find(|line| line.starts_with('{')).unwrap();
        let answer: Value = serde_json::from_str(line).unwrap();
        answer["embedding"].as_array().unwrap().iter().map(|number| number.as_f64().unwrap()).collect()
    };
    let (wide, narrow) = (vector(&embed), vector(&narrow));
    let product = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let cosine = product(&wide, &narrow) / (product(&wide, &wide) * product(&narrow, &narrow)).sqrt();
    assert!(cosine > 0.9999 && wide != narrow, "{cosine}");
}
