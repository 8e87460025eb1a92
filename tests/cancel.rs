//! Runs that are stopped from outside.

#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::time::{Duration, Instant};

use blip2::bundle::Bundle;
use blip2::pixels::Pixels;
use blip2::runtime::{Cancel, Runtime, RuntimeError, RuntimeOptions};
use blip2::vision::Vision;
use ndarray::{Array4, ArrayD};

fn vision() -> Vision {
    let bundle = Bundle::open(&Path::new(env!("CARGO_MANIFEST_DIR")).join("models/demo-opt")).unwrap();
    Vision::open(&Runtime::load(&RuntimeOptions::default()).unwrap(), &bundle).unwrap()
}

fn pixels(n_pictures: usize) -> Pixels {
    let value = |(picture, channel, y, x)| ((picture * 31 + channel * 7 + y * 3 + x) % 17) as f32 / 8.0 - 1.0;
    Pixels(Array4::from_shape_fn((n_pictures, 3, 96, 96), value))
}

fn encode(vision: &mut Vision, pixels: Pixels) -> Result<ArrayD<f32>, RuntimeError> {
    Ok(vision.encode(pixels)?.0.to_f32().unwrap())
}

#[test]
fn a_run_stops_in_the_middle_and_the_graph_runs_again() {
    let mut vision = vision();
    let (mut n_pictures, mut took) = (8, Duration::ZERO);
    while took < Duration::from_millis(500) {
        n_pictures *= 2;
        let (pixels, start) = (pixels(n_pictures), Instant::now());
        encode(&mut vision, pixels).unwrap();
        took = start.elapsed();
    }
    let before = encode(&mut vision, pixels(2)).unwrap();

    // Four times the work, so that a run that the stop misses takes longer than any noise; a first small run, so that it meets no new state.
    let (cancel, pixels_of_many) = (Cancel::new(), pixels(n_pictures * 4));
    vision.set_cancel(cancel.clone());
    encode(&mut vision, pixels(1)).unwrap();
    let start = Instant::now();
    let stopper = std::thread::spawn({
        let cancel = cancel.clone();
        move || {
            std::thread::sleep(took / 2);
            cancel.cancel();
        }
    });
    let stopped = encode(&mut vision, pixels_of_many);
    let waited = start.elapsed();
    stopper.join().unwrap();
    assert!(matches!(&stopped, Err(RuntimeError::Cancelled { graph }) if graph == "vision"), "{stopped:?}");
    assert!((took / 2..took * 2).contains(&waited), "stopped after {waited:?}, a quarter of the work takes {took:?}");

    assert!(cancel.is_cancelled());
    assert!(matches!(encode(&mut vision, pixels(1)), Err(RuntimeError::Cancelled { .. })), "it stays cancelled");
    vision.set_cancel(Cancel::new());
    assert_eq!(encode(&mut vision, pixels(2)).unwrap(), before, "a fresh one lets the graph run as before");
}

#[test]
fn a_stop_may_come_before_there_is_a_runtime() {
    let cancel = Cancel::new();
    cancel.cancel();
    let mut vision = vision();
    vision.set_cancel(cancel);
    assert!(matches!(encode(&mut vision, pixels(1)), Err(RuntimeError::Cancelled { .. })));
}
