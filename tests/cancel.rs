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

fn encode(vision: &mut Vision, n_pictures: usize) -> Result<ArrayD<f32>, RuntimeError> {
    let value = |(picture, channel, y, x)| ((picture * 31 + channel * 7 + y * 3 + x) % 17) as f32 / 8.0 - 1.0;
    let features = vision.encode(Pixels(Array4::from_shape_fn((n_pictures, 3, 96, 96), value)))?;
    Ok(features.0.to_f32().unwrap())
}

#[test]
fn a_run_stops_in_the_middle_and_the_graph_runs_again() {
    let mut vision = vision();
    let (mut n_pictures, mut took) = (8, Duration::ZERO);
    while took < Duration::from_millis(500) {
        n_pictures *= 2;
        let start = Instant::now();
        encode(&mut vision, n_pictures).unwrap();
        took = start.elapsed();
    }
    let before = encode(&mut vision, 2).unwrap();

    let (cancel, start) = (Cancel::new(), Instant::now());
    vision.set_cancel(cancel.clone());
    let stopper = std::thread::spawn({
        let cancel = cancel.clone();
        move || {
            std::thread::sleep(took / 8);
            cancel.cancel();
        }
    });
    // The same work many times over, so that a run that the stop misses takes longer than any noise.
    let stopped = encode(&mut vision, n_pictures * 4);
    let waited = start.elapsed();
    stopper.join().unwrap();
    assert!(matches!(&stopped, Err(RuntimeError::Cancelled { graph }) if graph == "vision"), "{stopped:?}");
    assert!(waited < took * 2, "stopped after {waited:?}, a quarter of the work takes {took:?}");

    assert!(cancel.is_cancelled());
    assert!(matches!(encode(&mut vision, 1), Err(RuntimeError::Cancelled { .. })), "it stays cancelled");
    vision.set_cancel(Cancel::new());
    assert_eq!(encode(&mut vision, 2).unwrap(), before, "a fresh one lets the graph run as before");
}

#[test]
fn a_stop_may_come_before_there_is_a_runtime() {
    let cancel = Cancel::new();
    cancel.cancel();
    let mut vision = vision();
    vision.set_cancel(cancel);
    assert!(matches!(encode(&mut vision, 1), Err(RuntimeError::Cancelled { .. })));
}
