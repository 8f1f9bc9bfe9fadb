package accesslog

import (
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// otlpSchema is the part of OTLP's logs that matters, and the types of AnyValue.
//
// Source: opentelemetry-proto v1, collector/logs/v1/logs_service.proto, logs/v1/logs.proto,
// common/v1/common.proto and resource/v1/resource.proto, joined into one file.
var otlpSchema = func() protoreflect.FileDescriptor {
	var file descriptorpb.FileDescriptorProto
	if err := prototext.Unmarshal([]byte(otlpFile), &file); err != nil {
		panic(err)
	}
	schema, err := protodesc.NewFile(&file, nil)
	if err != nil {
		panic(err)
	}
	return schema
}()

const otlpFile = `
name: "otlp.proto" package: "otlp" syntax: "proto3"
message_type { name: "ExportLogsServiceRequest"
  field { name: "resource_logs" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.ResourceLogs" } }
message_type { name: "ResourceLogs"
  field { name: "resource" number: 1 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".otlp.Resource" }
  field { name: "scope_logs" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.ScopeLogs" } }
message_type { name: "Resource"
  field { name: "attributes" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.KeyValue" } }
message_type { name: "ScopeLogs"
  field { name: "log_records" number: 2 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.LogRecord" } }
message_type { name: "LogRecord"
  field { name: "time_unix_nano" number: 1 label: LABEL_OPTIONAL type: TYPE_FIXED64 }
  field { name: "body" number: 5 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".otlp.AnyValue" }
  field { name: "attributes" number: 6 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.KeyValue" } }
message_type { name: "KeyValue"
  field { name: "key" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING }
  field { name: "value" number: 2 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".otlp.AnyValue" } }
message_type { name: "AnyValue" oneof_decl { name: "value" }
  field { name: "string_value" number: 1 label: LABEL_OPTIONAL type: TYPE_STRING oneof_index: 0 }
  field { name: "bool_value" number: 2 label: LABEL_OPTIONAL type: TYPE_BOOL oneof_index: 0 }
  field { name: "int_value" number: 3 label: LABEL_OPTIONAL type: TYPE_INT64 oneof_index: 0 }
  field { name: "double_value" number: 4 label: LABEL_OPTIONAL type: TYPE_DOUBLE oneof_index: 0 }
  field { name: "array_value" number: 5 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".otlp.ArrayValue" oneof_index: 0 }
  field { name: "kvlist_value" number: 6 label: LABEL_OPTIONAL type: TYPE_MESSAGE type_name: ".otlp.KeyValueList" oneof_index: 0 }
  field { name: "bytes_value" number: 7 label: LABEL_OPTIONAL type: TYPE_BYTES oneof_index: 0 } }
message_type { name: "ArrayValue"
  field { name: "values" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.AnyValue" } }
message_type { name: "KeyValueList"
  field { name: "values" number: 1 label: LABEL_REPEATED type: TYPE_MESSAGE type_name: ".otlp.KeyValue" } }
`
