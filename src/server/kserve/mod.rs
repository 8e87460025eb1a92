//! The Open Inference Protocol, version 2: models as functions of tensors, over HTTP and gRPC.
//!
//! `tensor` has what a request's tensors are and are not, `metadata` what is told of models, `infer` turns tensors into jobs and what comes
//! of them into tensors. `http` knows the protocol's JSON and its binary form, `grpc` and `wire` its messages, and nobody else does.

pub mod grpc;
pub mod http;
mod infer;
mod metadata;
mod tensor;
mod wire;
